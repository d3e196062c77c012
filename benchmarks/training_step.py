"""A training step with BatchNorm in the convolutions, beside one without.

    python -m benchmarks.training_step [--model_name efficientnet_lite0] [--side 192] [--rounds 5]

Both models take turns, and a round counts as the ratio of its two times.
"""

import time
from statistics import median

import torch
from transformers import PreTrainedModel

from benchmarks._common import build_parser

BATCH, STEPS = 32, 3


def main() -> None:
    """Print the images a second of both, and the median ratio with its lowest and highest."""
    from luthier.fusion import fuse_for_training
    from luthier.machine import configure_cpu
    from models import build_model

    parser = build_parser(__doc__)
    parser.add_argument("--model_name", default="efficientnet_lite0")
    parser.add_argument("--side", type=int, default=192, help="of the images in pixels (default: 192)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    configure_cpu(torch.device("cpu"))
    plain, _ = build_model(args.model_name, {index: str(index) for index in range(10)})
    fused = fuse_for_training(plain, (args.side, args.side))
    for model in (plain, fused):
        images_a_second(model, args.side)
    rounds = [[images_a_second(model, args.side) for model in (plain, fused)] for _ in range(args.rounds)]
    ratios = [after / before for before, after in rounds]
    print(f"{args.model_name}, {args.side} px, batch {BATCH}, {torch.get_num_threads()} threads, images/s:")
    print(f"BatchNorm by itself {median(pair[0] for pair in rounds):.1f}", end=", ")
    print(f"in the convolutions {median(pair[1] for pair in rounds):.1f}", end="; ")
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def images_a_second(model: PreTrainedModel, side: int) -> float:
    """Return the speed of a few steps, forward and backward, without the optimizer."""
    pixel_values = torch.randn(BATCH, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 10
    model.train()
    begin = time.perf_counter()
    for _ in range(STEPS):
        model.zero_grad()
        model(pixel_values=pixel_values, labels=labels).loss.backward()
    return STEPS * BATCH / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
