"""``python -m tightfit`` is the ``tightfit`` command."""

from tightfit.cli.main import main

if __name__ == "__main__":
    main()
