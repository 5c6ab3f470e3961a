"""The script that wrote molecules.csv: 500 of QM9's molecules (doi:10.1038/sdata.2014.22) from qm9pack 1.0.3.

    pip install --no-deps qm9pack==1.0.3
    python -m benchmarks.grokking.extract_molecules

Each row is a molecule: QM9's number, isotropic polarizability in bohr³, elements, and positions in Å, atom by atom.
"""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import torch

from .tasks import packaged
from .tasks.molecules import PATH

COUNT = 500


def main() -> None:
    rows = []
    for part in (1, 2, 3):
        with Path(packaged("qm9pack", f"data/qm9_part{part}.csv")).open(newline="") as file:
            rows += [
                [row[key] for key in ("Index", "Polarizability_bohr3", "Elements", "XYZ_Ang")]
                for row in csv.DictReader(file)
            ]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:COUNT].sort().values
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "polarizability", "elements", "positions"])
        for index, polarizability, elements, positions in (rows[i] for i in chosen):
            xyz = " ".join(f"{x:.3f}" for atom in ast.literal_eval(positions) for x in atom)
            writer.writerow([index, polarizability, "".join(ast.literal_eval(elements)), xyz])


if __name__ == "__main__":
    main()
