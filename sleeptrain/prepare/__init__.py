"""Text files to token shards: found (`inputs`), cut into units of work (`units`), read (`readers`), tokenised by
several processes (`worker`, `crew`), put together (`assembly`); `job` leads through it and can be killed at any moment.
"""
