import sys

from endurance.cli import main

sys.exit(main())
