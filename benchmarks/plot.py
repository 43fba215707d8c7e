"""Draw the pictures of all result files, each as the PNG beside its file; needs matplotlib.

python benchmarks/plot.py [FOLDER]      benchmarks/results unless named

training_curves.png is drawn by plot_curves.py, which trains first.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Which module draws results/*/NAME.json.
DRAWN_BY = {
    "attention_curves": "plot_attention",
    "attention_pairs": "plot_flops",
    "flops_decoder_masking": "plot_flops",
    "mask_coverage": "plot_masks",
    "mask_ratio": "plot_mask_ratio",
    "memory_dual_masking": "plot_memory",
    "run_costs": "plot_run_costs",
}


def main(results: Path = HERE / "results") -> list[Path]:
    """Draw what a folder of published/NAME.json and DEVICE/NAME.json holds; the pictures."""
    files = [file for file in sorted(results.glob("*/*.json")) if file.stem in DRAWN_BY]
    return [importlib.import_module(DRAWN_BY[file.stem]).draw(file) for file in files]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    print("\n".join(map(str, main(folder))) or f"nothing under {folder} that has a picture")
