"""`python -m spartan_ray` is `spartan`."""

from spartan_ray.cli.main import main

if __name__ == "__main__":
    main()
