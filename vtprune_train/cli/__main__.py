"""``python -m vtprune_train.cli``"""

from vtprune_train.cli import main

raise SystemExit(main())
