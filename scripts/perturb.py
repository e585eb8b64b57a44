"""Compare explanation methods by perturbation: ``python scripts/perturb.py checkpoint=…``."""

from clipmapper.cli import perturb

if __name__ == "__main__":
    perturb()
