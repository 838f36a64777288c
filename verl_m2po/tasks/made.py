"""The tasks that are made on the spot, by name: that of their module, and of the data source in verl's rows."""

from verl_m2po.tasks import arithmetic, column_addition

TASKS = {task.data_source: task for task in (arithmetic.TASK, column_addition.TASK)}
