"""Refits the placement cost model on published serving rows and cross-validates it by leaving out one GPU type at a
time.

    python benchmarks/fit_cost_model.py ROWS.csv [--write]

ROWS.csv has the columns of ServingRow. With --write the parameters, the rows and the folds go to
passes/placement/data/cost_parameters.json. Eight parameters are fitted in log space by least squares on log(predicted /
measured), each held near a prior by a width that says how far it may reasonably be from it.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from moec.passes.placement.calibration import ServingRow, parameters_to_dict, predict_row, row_case
from moec.passes.placement.cost import CostParameters

TARGET = Path(__file__).resolve().parents[1] / "passes/placement/data/cost_parameters.json"
NOISE = 0.05  # spread of a measurement about a good model, in log space
PRIORS = {  # name: (prior, width in log space, where it comes from)
    "memory": (0.75, 0.15, "usual fraction of peak DRAM bandwidth that weight streaming reaches"),
    "compute": (0.5, 0.3, "usual fraction of dense peak in large grouped GEMMs"),
    "nvlink": (0.6, 0.3, "NCCL all-reduce without in-switch reduction: 215 to 370 GB/s bus bandwidth of 450"),
    "pcie": (0.42, 0.15, "12.7 GB/s of 31.5 on 4x4090 (tinygrad issue 22), 28 of 63 on 8x5090 (nccl issue 1639)"),
    "latency": (1.0, 0.3, "the link's published small-message latency"),
    "layer_overhead_s": (40e-6, 0.5, "about ten kernel launches of a few microseconds"),
    "step_overhead_s": (4e-3, 1.0, "scheduler and sampling of a loaded server"),
    "sequence_overhead_s": (5e-6, 1.0, "host bookkeeping of one sequence in a step"),
}
NOT_FITTED = {"network": 0.8, "shared-memory": 0.5}  # no rows; NCCL over InfiniBand reaches about 0.8 of a port


def parameters(values: np.ndarray, log_error: float = 0.0) -> CostParameters:
    v = dict(zip(PRIORS, map(float, values), strict=True))
    link = {"nvlink": v["nvlink"], "pcie": v["pcie"], **NOT_FITTED}
    overheads = (v["layer_overhead_s"], v["step_overhead_s"], v["sequence_overhead_s"])
    return CostParameters(v["memory"], {"bf16": v["compute"]}, link, v["latency"], *overheads, log_error)


def fit(cases: list, measured: np.ndarray) -> np.ndarray:
    start = np.array([p for p, _, _ in PRIORS.values()])
    width = np.array([w for _, w, _ in PRIORS.values()])

    def residuals(offset: np.ndarray) -> np.ndarray:
        params = parameters(start * np.exp(offset))
        predicted = np.array([predict_row(case, params) for case in cases])
        return np.concatenate([np.log(predicted / measured) / NOISE, offset / width])

    return start * np.exp(least_squares(residuals, np.zeros(len(start)), max_nfev=12, diff_step=1e-3).x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--leave-out",
        default="gpu",
        choices=("gpu", "model", "num_gpus", "input_len", "output_len"),
        help="what the rows of a fold have in common; only folds by gpu can be written",
    )
    args = parser.parse_args()
    if args.write and args.leave_out != "gpu":
        parser.error("--write keeps the folds by gpu; run it without --leave-out")
    with args.rows.open() as file:
        rows = [ServingRow.from_strings(r) for r in csv.DictReader(file)]
    cases = [row_case(r) for r in rows]
    measured = np.array([r.output_tokens_per_s for r in rows])
    gpus = [getattr(r, args.leave_out) for r in rows]
    left_out, predicted = {}, np.zeros(len(rows))
    for gpu in sorted(set(gpus)):
        kept = [i for i, g in enumerate(gpus) if g != gpu]
        values = fit([cases[i] for i in kept], measured[kept])
        tested = [i for i, g in enumerate(gpus) if g == gpu]
        predicted[tested] = [predict_row(cases[i], parameters(values)) for i in tested]
        error = np.abs(predicted[tested] / measured[tested] - 1)
        print(
            f"left out {gpu!s:5s} rows {len(tested):3d}  mean error {100 * error.mean():5.2f} %  worst "
            f"{100 * error.max():5.2f} %",
            flush=True,
        )
        left_out[gpu] = parameters_to_dict(parameters(values))
    error = np.abs(predicted / measured - 1)
    log_error = float(np.sqrt(np.mean(np.log(predicted / measured) ** 2)))
    final = parameters(fit(cases, measured), log_error)
    train = np.array([predict_row(c, final) for c in cases]) / measured - 1
    worst = rows[int(error.argmax())]
    print(
        f"left out, all rows: mean absolute percentage error {100 * error.mean():.2f} %; fitted on all rows "
        f"{100 * np.abs(train).mean():.2f} %"
    )
    print(f"worst row: {worst.gpu}x{worst.num_gpus} {worst.input_len}/{worst.output_len}: {100 * error.max():.1f} %")
    print(json.dumps(parameters_to_dict(final), indent=1))
    if args.write:
        data = {
            "source": "NVIDIA TensorRT-LLM v0.17 performance overview, the rows listed",
            "priors": {k: {"value": p, "log_width": w, "reason": why} for k, (p, w, why) in PRIORS.items()},
            "parameters": parameters_to_dict(final),
            "left_out": left_out,
            "rows": [asdict(r) for r in rows],
        }
        TARGET.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
