"""`python -m spartan_ray` is `spartan`."""

from spartan_ray.cli import main

if __name__ == "__main__":
    main()
