-- An outbox table that is there already gets what it lacks: ids in the order of the inserts, which only the database
-- gives, and an index to read by. Adding the column rewrites the table once, under an exclusive lock.
--
-- Rows that are there by then are numbered as they lie in the table, not as they were written: up to which id is kept.
ALTER TABLE {removed} ADD COLUMN IF NOT EXISTS numbered_to bigint NOT NULL DEFAULT 0;
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_attribute
                WHERE attrelid = {outbox_regclass}::regclass AND attname = {id_name} AND NOT attisdropped) THEN
        RETURN;
    END IF;
    ALTER TABLE {outbox} ADD COLUMN {id} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1);
    INSERT INTO {removed} (outbox, numbered_to) SELECT {outbox_name}, coalesce(max({id}), 0) FROM {outbox}
    ON CONFLICT (outbox) DO UPDATE SET numbered_to = excluded.numbered_to;
END $$;
CREATE UNIQUE INDEX IF NOT EXISTS {id_index} ON {outbox} ({id});
