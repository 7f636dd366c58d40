"""Run the `spartan` command with `python -m spartan_ray`."""

import sys

if __name__ == "__main__":
    try:
        from spartan_ray.cli.main import main
    except ModuleNotFoundError as error:  # a job may use another Python than intended
        sys.exit(f"spartan: {sys.executable} has no module {error.name}, which spartan-ray needs")
    main()
