"""flashomni.attention, where the published wrapper is looked for (docs/migration.md)."""

from flashomni.compat.wrapper import BatchFlashOmniFAWithRaggedKVWrapper

__all__ = ["BatchFlashOmniFAWithRaggedKVWrapper"]
