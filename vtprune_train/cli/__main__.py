"""``python -m vtprune_train.cli``"""

import sys

from vtprune_train.cli import main

sys.exit(main())
