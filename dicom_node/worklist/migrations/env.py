"""Run by Alembic, always on the connection and within the transaction that `schema.upgrade` opened."""

from alembic import context

from dicom_node.worklist.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection, target_metadata=metadata, transactional_ddl=True, transaction_per_migration=False
)
with context.begin_transaction():
    context.run_migrations()
