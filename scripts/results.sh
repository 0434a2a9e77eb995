#!/bin/sh
# Every run behind docs/results.md: collect, train, evaluate. `sh scripts/results.sh FOLDER`; the same command resumes.
#
# Two recipes. paper: BatchTopK, k 32, random start, of writes and of states. default: TopK, k 1, started from native
# writes, in squared errors and in the metric. Three heads of each model: those whose writes do most, one of a layer; of
# embedded, all heads of layer 4 (claim 5). FOLDER/runs/RECIPE/MODEL/HEAD gets the results.
# Four hours of one core. `python scripts/results.py FOLDER` makes the tables and the page, also of a part of it.
set -euf
OUT=$1
FIRST="embedded:4:2 embedded-mamba2:7:0 embedded-rwkv7:1:5"
HEADS="$FIRST embedded:2:3 embedded-mamba2:6:1 embedded-rwkv7:3:4 embedded:1:3 embedded-mamba2:3:3 embedded-rwkv7:2:0"
LAYER="embedded:4:0 embedded:4:1 embedded:4:3"

place() { model=${1%%:*} layer=${1#*:}; layer=${layer%:*} head=${1##*:}; saes=$OUT/saes/$model cell=L${layer}H$head; }
train() { # PLACE RECIPE NAME...
    place "$1"; recipe=$2; shift 2
    set -- --names "$@" --layers "$layer" --heads "$head" --out "$saes/$recipe" --d-sae 256 \
        --training-tokens 64000 --train-batch-size-tokens 64
    if [ "$recipe" = default ]; then python -m writesae train --model "$model" --context-size 128 "$@"; else
        python -m writesae train --collection "$saes/default/collection" --architecture writesae_batchtopk --k 32 \
            --decoder-init random "$@"; fi
}
evaluate() { # PLACE RECIPE FLAGS NAME...: results of dictionaries together, "KINDS ..." first
    place "$1"; recipe=$2 flags=$3; shift 3
    for name; do shift; set -- "$@" "$saes/${recipe%%-*}/$cell/$name/sae"; done
    # shellcheck disable=SC2086
    python -m writesae eval all "$@" --resume --sequences 48 --collection "$saes/default/collection" \
        --out "$OUT/runs/$recipe/$model/$cell" $flags
}
SET='--set n_atoms=24 firings_per_atom=4 atom_choice=["dominant"] erasure.n_atoms=12'
# Control dictionaries, thrice the work, are asked where a claim holds for trained ones: no other verdict depends on them.
CONTROLLED="--control-dictionaries $SET"
SUBSTITUTION="--kinds substitution --no-control-dictionaries $SET"
ATOMS="--kinds partition erasure $CONTROLLED"
FORMULAS="--kinds logit_change multistep --control-dictionaries --set n_atoms=12"
OTHERS="--kinds sign install passage --no-control-dictionaries --set n_atoms=12 sign.n_positions=48"
COMPARED="--kinds baselines seeds objectives --control-dictionaries --set n_atoms=24"
AMPLIFIED="--kinds amplify --no-control-dictionaries --set prompts=20"

for model in embedded embedded-mamba2 embedded-rwkv7; do # the only pass over the training text
    case $model in
        embedded) layers="1 2 4" heads="0 1 2 3" ;;
        embedded-mamba2) layers="3 6 7" heads="0 1 3" ;;
        *) layers="1 2 3" heads="0 4 5" ;;
    esac
    folder=$OUT/saes/$model/default/collection
    # shellcheck disable=SC2086
    [ -e "$folder.done" ] || python -m writesae collect --model $model --layers $layers --heads $heads \
        --targets write state --out "$folder"
    : >"$folder.done"
done
for at in $FIRST; do # with control dictionaries; the runs below leave these as they are
    train "$at" default write-seed0
    train "$at" paper write-seed0
    evaluate "$at" paper "--kinds substitution partition erasure $CONTROLLED" write-seed0
    evaluate "$at" default "--kinds substitution $CONTROLLED" write-seed0
    evaluate "$at" paper "$AMPLIFIED" write-seed0
    evaluate "$at" paper-last "--text last $SUBSTITUTION" write-seed0
    evaluate "$at" default-last "--text last $SUBSTITUTION" write-seed0
done
for at in $HEADS; do
    train "$at" default write-seed0 write-gauss_newton-seed0
    train "$at" paper write-seed0 state-seed0
    evaluate "$at" paper "$SUBSTITUTION" write-seed0
    evaluate "$at" default "$SUBSTITUTION" write-seed0
    evaluate "$at" default-metric "$SUBSTITUTION" write-gauss_newton-seed0
    evaluate "$at" paper-state "$SUBSTITUTION" state-seed0
done
for at in $LAYER; do
    for recipe in paper default; do
        train "$at" $recipe write-seed0
        evaluate "$at" $recipe "$SUBSTITUTION" write-seed0
    done
done
for at in $HEADS; do
    evaluate "$at" paper "$FORMULAS" write-seed0
    evaluate "$at" paper "$OTHERS" write-seed0
    evaluate "$at" paper "$ATOMS" write-seed0
    train "$at" paper write-seed1 write-WriteSAE-rank2-seed0 write-FlatSAE-seed0 write-FlatSAE-matched-seed0
    evaluate "$at" paper "$COMPARED" write-seed0 write-seed1 write-WriteSAE-rank2-seed0 write-FlatSAE-seed0 \
        write-FlatSAE-matched-seed0 state-seed0
done
python scripts/nulls.py "$OUT"
python scripts/equal_bits.py "$OUT"
