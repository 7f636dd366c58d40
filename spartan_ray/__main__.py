"""`python -m spartan_ray` is `spartan`."""

import sys

if __name__ == "__main__":
    try:
        from spartan_ray.cli.main import main
    except ModuleNotFoundError as error:  # a job's Python is not always the one that was meant
        sys.exit(f"spartan: {sys.executable} has no module {error.name}, which this package needs")
    main()
