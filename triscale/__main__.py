"""python -m triscale."""

from triscale.cli import main

if __name__ == "__main__":
    main()
