"""Fails unless the installed packages fit together: the versions, torchvision beside torch, grouped_mm on this CPU."""

import sys
import warnings


def main() -> int:
    warnings.simplefilter("ignore")
    import fairseq
    import torch
    import torchvision  # a torchvision built for another torch fails here

    bank = torch.ones(1, 16, 16)
    ends = torch.tensor([4], dtype=torch.int32)
    product = torch.nn.functional.grouped_mm(torch.ones(4, 16), bank, offs=ends)
    if not torch.equal(product, torch.full((4, 16), 16.0)):
        print("setup: error: torch.nn.functional.grouped_mm gives a wrong product on this CPU", file=sys.stderr)
        return 1
    import torchscale.architecture.decoder  # noqa: F401

    import mhmoe_fairseq

    print(
        f"setup: mhmoe_fairseq {mhmoe_fairseq.__version__}, fairseq {fairseq.__version__}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, GPU: {'yes' if torch.cuda.is_available() else 'no'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
