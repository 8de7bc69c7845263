"""Text files to token shards.

Steps: list the files (`inputs`), cut them into units of work (`units`), read them (`unpack`, `parquet`, `readers`),
tokenise them in several processes (`worker`, `worker_pool`), put the shards together (`assembly`). `job` runs the steps
in order and can be killed at any moment.
"""
