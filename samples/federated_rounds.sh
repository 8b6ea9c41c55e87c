#!/usr/bin/env bash
# Federated rounds in the shell: four clinics adapt one model to their own handwritten digits, each
# at the rank that its machine can train. What moves between them and the server is folders.
#
#     samples/federated_rounds.sh [ROUNDS] [DIR]
#
# It needs `fedlora`, and for the clinics torch, transformers, peft and scikit-learn (the digits).
# It writes, for every round:
#
#     DIR/round-01/start/clinic-a      what the server hands out
#     DIR/round-01/clients/clinic-a    what comes back, trained
#     DIR/round-01/global              what the server makes of all of them
set -euo pipefail

rounds=${1:-4}
dir=${2:-federated-rounds}
samples=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 # one core for each clinic

# Every clinic's own digits, which never leave it.
python "$samples/make_samples.py" --data "$dir/data"

# Round 1 starts from adapters that change nothing yet. The small ones are the beginnings of the
# large ones, so that rank index 1 means the same to everybody.
mkdir -p "$dir/round-01/start"
fedlora init "$samples/base" -o "$dir/round-01/initial" --ranks 2,4,8,16 \
    --target-modules q_proj,v_proj,fc1,fc2 --modules-to-save classifier
cp -r "$dir/round-01/initial/rank-4" "$dir/round-01/start/clinic-a"
cp -r "$dir/round-01/initial/rank-2" "$dir/round-01/start/clinic-c"
cp -r "$dir/round-01/initial/rank-16" "$dir/round-01/start/clinic-f"
cp -r "$dir/round-01/initial/rank-8" "$dir/round-01/start/clinic-g"

for ((t = 1; t <= rounds; t++)); do
    this=$dir/round-$(printf %02d "$t")
    next=$dir/round-$(printf %02d "$((t + 1))")
    echo "== $this"

    # The clinics: each one trains its adapter on its own data. Two at a time on this machine.
    printf '%s\n' clinic-a clinic-c clinic-f clinic-g | xargs -P 2 -I CLINIC \
        python "$samples/train_client.py" "$this/start/CLINIC" "$dir/data/CLINIC.jsonl" \
        -o "$this/clients/CLINIC" --epochs 5 --lr 2e-3 --seed "$t"

    # The server: one global adapter from all of them, and from the rounds before. Rank index 9-16
    # comes from clinic-f alone; the quorum bounds its weight there, and the last round has the rest.
    fedlora aggregate "$this/clients" -o "$this/global" --rounds "$dir" --quorum 0.25 --quiet

    # For the next round, that adapter at the rank of every clinic.
    if ((t < rounds)); then
        mkdir -p "$next"
        fedlora distribute "$this/global" -o "$next/start" --like "$this/clients" --quiet
    fi
done

# Are the high ranks alive?
fedlora diagnose "$dir"
