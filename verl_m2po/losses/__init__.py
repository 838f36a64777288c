"""Policy losses. Importing this package registers all of them with verl."""

from verl_m2po.losses.kernel import registry

registry.load()
