"""What every command found out, as plain values. All that is shown or stored comes from here."""
