#!/usr/bin/env python
"""Train a vision-language model with dropped visual tokens.

deepspeed train.py --config configs/llava_next_pdrop.yaml key=value ...
torchrun --nproc_per_node 8 train.py --config ...
python train.py --config ... --dry_run
"""

import sys

from vtprune_train.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
