"""What cuBLAS does with the dense products of LLaMA-7B's layers in bf16, by PyTorch: set beside operations.txt of a report."""

import torch

SHAPES = {"q, k and v": (3 * 4096, 4096), "o": (4096, 4096), "gate and up": (2 * 11008, 4096), "down": (4096, 11008)}
BYTES = 512 << 20  # of different weights, more than any second-level cache

print(torch.cuda.get_device_name(), torch.__version__)
print(f"{'':<14}{'rows':>6}{'us':>10}{'GB/s':>9}{'TFLOP/s':>9}")
for name, (out, inp) in SHAPES.items():
    copies = max(1, BYTES // (2 * out * inp))
    weights = [torch.randn(out, inp, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    for rows in [1, 8, 32, 64, 256, 2048]:
        x = torch.randn(rows, inp, device="cuda", dtype=torch.bfloat16)
        best = float("inf")
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / copies)
        print(f"{name:<14}{rows:>6}{best * 1e6:>10.1f}{2 * out * inp / best / 1e9:>9.0f}{2 * rows * out * inp / best / 1e12:>9.1f}")
