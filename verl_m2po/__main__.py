"""``python -m verl_m2po`` is the ``verl-m2po`` command."""

from verl_m2po.cli.main import main

main()
