"""How fast the ascent and decoding under control are, against what one would run without this package.

python -m pytest benchmarks             # all of it, some fifteen minutes on two cores; rows go to benchmarks/data
python -m pytest benchmarks --smoke     # small sizes, seconds; rows go to a temporary file
python -m benchmarks.table              # the recorded rows as Markdown
benchmarks/gpu.sh                       # on a GPU: build, test and measure, under nine minutes; see benchmarks.gpu
"""
