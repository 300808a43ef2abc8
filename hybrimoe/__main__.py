"""`python -m hybrimoe` is the `hybrimoe` command."""

from hybrimoe.cli.app import main

if __name__ == "__main__":
    main()
