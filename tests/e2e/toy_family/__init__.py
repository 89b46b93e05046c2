"""A family as small as one can be; test_toy_family.py copies it into the package."""
