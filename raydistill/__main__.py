"""`python -m raydistill`: what a submitted job runs, from the files that came with it."""

from raydistill.cli import main

if __name__ == "__main__":
    main()
