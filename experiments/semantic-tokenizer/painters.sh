#!/bin/sh
# Do semantic codes already hold what alignment adds? A plain and an aligned painter on the plain and
# on the semantic tokenizer of run.sh; from the repository's root, two threads.
#     sh experiments/semantic-tokenizer/painters.sh
set -eu
out=runs/semantic-tokenizer
export OMP_NUM_THREADS=1
for codes in plain semantic; do
    arra study builtin:scenes --image-tokenizer $out/$codes --encoder clip=builtin:scenes-clip \
        --size 64 --limit 9600 --judge builtin:scenes-judge --distances fd --set steps=300 \
        --prompts 256 --unseen 128 --points 2 --point-prompts 32 --guidances 1 1.5 2 \
        --guidance-prompts 64 --threads 1 --out $out/painters-$codes
done
python experiments/semantic-tokenizer/collect.py $out
