"""On a GPU: the ascent, a decode step of a 7B model and a training step, captured in CUDA graphs where they can be.

python -m benchmarks.gpu ascend decode training     # rows go to benchmarks/data/gpu.csv
python -m benchmarks.gpu ascend --device cpu --tiny --rows tiny.csv     # shows that everything runs; its numbers mean nothing
python -m benchmarks.table benchmarks/data/gpu.csv  # the recorded rows as Markdown

`benchmarks/gpu.sh` builds, tests and measures in one go.
"""
