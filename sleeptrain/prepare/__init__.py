"""Text files to token shards: found (`inputs`), cut into units of work (`units`), read (`unpack`, `parquet`,
`readers`), tokenised by several processes (`worker`, `worker_pool`), put together (`assembly`); `job` leads through it
and can be killed at any moment.
"""
