"""The short table of the README from a report: python examples/movie_reviews/summary.py reports/movie_reviews/report.csv."""

import csv
import sys
from pathlib import Path

COLUMNS = {
    "method": "method",
    "setting": "chosen setting",
    "reward": "reward",
    "win_rate": "win rate",
    "kl": "KL, nats",
    "nll": "NLL",
    "diversity": "diversity",
    "length": "tokens",
    "added_ms_per_token": "added ms a token",
    "training_seconds": "training, s",
}
DIGITS = {"reward": 2, "win_rate": 2, "kl": 1, "nll": 2, "diversity": 2, "length": 1, "added_ms_per_token": 2, "training_seconds": 0}


def summary(path: Path) -> str:
    """Render the rows of a report's CSV file as a table in Markdown; intervals of the reward are at 95 %."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [list(COLUMNS.values())]
    for row in rows:
        cells = []
        for name in COLUMNS:
            text = row[name] if name not in DIGITS or not row[name] else f"{float(row[name]):.{DIGITS[name]}f}"
            if name == "reward":
                text += f" [{float(row['reward_low']):.2f}, {float(row['reward_high']):.2f}]"
            cells.append(text)
        lines.append(cells)
    lines.insert(1, ["---"] * len(COLUMNS))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
