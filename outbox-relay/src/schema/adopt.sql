-- An outbox table that is there already gets what it lacks: ids in the order of the inserts, which only the database
-- gives, and an index to read by. Adding the column rewrites the table once, under an exclusive lock. What is
-- there is left alone: even to look would wait for all who write.
--
-- Rows that are there by then are numbered as they lie in the table, not as they were written: up to which id is kept.
DO $adopt$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute
                    WHERE attrelid = {outbox_regclass}::regclass AND attname = {id_name} AND NOT attisdropped) THEN
        ALTER TABLE {outbox} ADD COLUMN {id} bigint GENERATED ALWAYS AS IDENTITY (CACHE 1);
        INSERT INTO {removed} (outbox, numbered_to) SELECT {outbox_name}, coalesce(max({id}), 0) FROM {outbox}
        ON CONFLICT (outbox) DO UPDATE SET numbered_to = excluded.numbered_to;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                    WHERE i.indrelid = {outbox_regclass}::regclass AND i.indisunique AND i.indisvalid AND i.indnatts = 1
                      AND i.indpred IS NULL AND a.attname = {id_name}) THEN
        CREATE UNIQUE INDEX IF NOT EXISTS {id_index} ON {outbox} ({id});
    END IF;
END $adopt$;
