"""Many runs and what they say together. A run itself is the business of `spartan_ray.run`."""
