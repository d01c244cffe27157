#!/usr/bin/env bash
# What to run first on a card that is there for ten minutes, in order of worth. Each part has its own limit, and
# every figure is written as it comes, to out/benchmarks or $OUT.
#
#     bash benchmarks/gpu.sh                # on a GPU
#     SCALE=0.01 bash benchmarks/gpu.sh     # anywhere, in a tiny size: only that it runs
cd "$(dirname "$0")/.."
OUT=${OUT:-out/benchmarks}
SCALE=${SCALE:-1}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
model=random tests="tests/kernels" rows=64 length=1024 questions=32 rollouts=16 budget=1024
if [ "$SCALE" != 1 ]; then
  model=mini tests="tests/kernels -k swiglu" rows=2 length=64 questions=2 rollouts=4 budget=32
fi
failed=0

part() {  # part SECONDS NAME COMMAND...
  limit=$1 name=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { echo "== $name: status $status"; failed=1; }
}

part 240 kernels "$PYTHON" -m pytest -q -x $tests
part 90 decode "$PYTHON" benchmarks/sampling.py --load decode --model $model --scale "$SCALE" --repeats 3 --out "$OUT/decode.json"
part 120 nano-vllm "$PYTHON" benchmarks/sampling.py --load nano-vllm --model $model --scale "$SCALE" --repeats 1 --out "$OUT/nano-vllm.json"
part 90 sft "$PYTHON" benchmarks/training.py sft --model $model --rows $rows --length $length --steps 5 --repeats 1 --out "$OUT/sft.json"
part 120 grpo "$PYTHON" benchmarks/training.py grpo --model $model --questions $questions --rollouts $rollouts \
  --max-new-tokens $budget --steps 2 --repeats 1 --out "$OUT/grpo.json"
part 120 ops "$PYTHON" benchmarks/ops.py --scale "$SCALE" --repeats 3 --out "$OUT/ops.json"
exit $failed
