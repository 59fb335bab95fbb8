-- An outbox table that is there already gets what it lacks: ids in the order of the inserts, which only the database
-- gives, and an index to read by. Adding the column rewrites the table once, under an exclusive lock.
ALTER TABLE {outbox} ADD COLUMN IF NOT EXISTS {id} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1);
CREATE UNIQUE INDEX IF NOT EXISTS {id_index} ON {outbox} ({id});
