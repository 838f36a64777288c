"""Adds the trainer mode of `benchmarks.tour` where VERL_USE_EXTERNAL_MODULES names this module."""

from verl_m2po.plugin import Extension, install

install(Extension("trainer mode", "verl.trainer.ppo.v1", "benchmarks.tour", ("method_tour",)))
