"""Commands that only read adapters: inspect, diagnose, compare, predict."""
