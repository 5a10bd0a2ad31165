"""``python -m lqedu`` is the ``lqedu`` command."""

from lqedu.cli import main

if __name__ == "__main__":
    main()
