#!/usr/bin/env bash
# Measures the kernels on a GPU runner, compares with the baselines, reports.
#
#   bench/ci.sh BASELINE.jsonl ARTEFACTS [argument of `reelforge bench kernels` ...]
#
# ARTEFACTS gets records.jsonl, compare.txt, compare.json, report.md and the roofline picture; they are written after a
# failed measurement too, from what it left. BENCH_RENEW=1 appends the judged records to BASELINE.jsonl.
# Exit code: that of `reelforge bench kernels` where it failed, else that of `reelforge bench compare`.
set -uo pipefail

if (($# < 2)); then
    echo "usage: bench/ci.sh BASELINE.jsonl ARTEFACTS [argument of reelforge bench kernels ...]" >&2
    exit 2
fi
baseline=$1 artefacts=$2
shift 2
reelforge=${REELFORGE:-reelforge}
records=$artefacts/records.jsonl
if [[ -e $records ]]; then
    echo "bench/ci.sh: $records is there already: choose an empty folder, so that one run is one file." >&2
    exit 2
fi
mkdir -p "$artefacts" "$(dirname "$baseline")" || exit 2
touch "$baseline" || exit 2

"$reelforge" bench kernels --out "$records" "$@"
measured=$?

"$reelforge" bench compare "$baseline" "$records" --json >"$artefacts/compare.json"
renew=()
if [[ ${BENCH_RENEW:-0} == 1 ]]; then renew=(--renew); fi
"$reelforge" bench compare "$baseline" "$records" ${renew[@]+"${renew[@]}"} | tee "$artefacts/compare.txt"
compared=${PIPESTATUS[0]}

if [[ -e $records ]]; then
    "$reelforge" bench report "$records" --out "$artefacts/report.md"
fi

if ((measured)); then exit "$measured"; fi
exit "$compared"
