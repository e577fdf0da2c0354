"""`hive_check`: `facts` looks, `findings` judges, `checker` narrates."""

from rbee_hive.check.checker import HiveChecker

__all__ = ["HiveChecker"]
