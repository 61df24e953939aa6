"""Two frozen encoders, labelled data -> a table with intervals, and who is better.

    python examples/benchmark_two_encoders.py                  # random against hand-made features
    python examples/benchmark_two_encoders.py runs/NAME timm:resnet18 \\
        --data camvid:PATH davis:PATH --protocols linear-probe dense-knn label-propagation

The same from the command line: ssl-flow eval suite.
"""

import argparse
import sys
from pathlib import Path

from ssl_flow.evaluation.protocols import parse_settings
from ssl_flow.evaluation.suite import Options, plan, run_cells
from ssl_flow.evaluation.suite_report import write_results

parser = argparse.ArgumentParser(description="Compare frozen encoders on labelled data.")
parser.add_argument(
    "encoders", nargs="*", default=["random:resnet18", "handmade"], help="SPEC, or NAME=SPEC,SPEC"
)
parser.add_argument(
    "--data", nargs="+", default=["synthetic"], help="camvid:PATH, folder:PATH, ..."
)
parser.add_argument("--protocols", nargs="+", default=["linear-probe", "dense-knn"])
parser.add_argument("--set", nargs="*", default=[], help="changed settings: linear-probe.steps=200")
parser.add_argument("--seeds", type=int, default=1, help="runs of each encoder")
parser.add_argument("--out", type=Path, default=Path("scores"))


def main() -> None:
    """Check everything, compute what is missing, show the table."""
    args = parser.parse_args()
    options = Options(encoders=args.encoders, data=args.data, out=args.out, seeds=args.seeds)

    # A cell is one number to be: protocol x data x encoder x seed. `plan` loads every encoder and
    # opens all data first, so that a wrong path is told before hours of work.
    cells = plan(options, parse_settings(args.protocols, args.set))

    # Finished cells lie in OUT/cells: a second call computes only what is missing.
    run_cells(cells, options)
    results, table = write_results(cells, options, " ".join(sys.argv))
    print(table)

    # "Better" is said only where 95 % intervals and runs do not overlap.
    for found in results["tables"]:
        for row in found["rows"]:
            for other in row["better_than"]:
                what = f"{found['data']}, {found['protocol']['name']}"
                print(f"{what}: {row['encoder']} is better than {other}")
    print(f"pictures and single images: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
