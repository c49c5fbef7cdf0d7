"""`python -m preflight`: opens each service once, with your keys; see deploy/preflight.py."""

from deploy.preflight import main

if __name__ == "__main__":
    main()
