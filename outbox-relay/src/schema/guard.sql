-- A row that went before it was published is an event lost. Retention removes rows below the floor, and nothing else.
CREATE OR REPLACE FUNCTION {refuse}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('outbox.removing', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the outbox is insert-only: % refused', TG_OP
        USING ERRCODE = 'restrict_violation', HINT = 'rows leave through the relay''s retention';
END
$$;

-- Not where it is already: that would wait for every open transaction that wrote, and all other writers behind it. 58:
-- before UPDATE, DELETE and TRUNCATE, for each statement.
DO $guard$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {outbox_regclass}::regclass AND tgname = {guard_name}::name
                      AND tgtype = 58 AND tgenabled <> 'D') THEN
        CREATE OR REPLACE TRIGGER {guard}
            BEFORE UPDATE OR DELETE OR TRUNCATE ON {outbox}
            FOR EACH STATEMENT EXECUTE FUNCTION {refuse}();
    END IF;
END $guard$;

-- Removes published rows by id range, at most up to the floor of every relay of this table, and returns how far it got.
-- With the rights of its owner: whoever runs the relay need not be able to delete anything else.
CREATE OR REPLACE FUNCTION {remove}(up_to bigint, max_ids bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    from_id bigint;
    lowest bigint;
    to_id bigint;
BEGIN
    INSERT INTO {removed} (outbox) VALUES ({outbox_name}) ON CONFLICT DO NOTHING;
    SELECT r.removed_to INTO from_id FROM {removed} r WHERE r.outbox = {outbox_name} FOR UPDATE;
    SELECT min(r.floor) INTO lowest FROM {relay} r WHERE r.outbox = {outbox_name};
    IF lowest IS NULL THEN -- least() would pass over it
        RETURN from_id;
    END IF;
    to_id := least(up_to, lowest, from_id + max_ids);
    IF to_id <= from_id THEN
        RETURN from_id;
    END IF;
    PERFORM set_config('outbox.removing', 'on', true);
    DELETE FROM {outbox} o WHERE o.{id} > from_id AND o.{id} <= to_id;
    PERFORM set_config('outbox.removing', 'off', true);
    UPDATE {removed} r SET removed_to = to_id WHERE r.outbox = {outbox_name};
    RETURN to_id;
END
$$;
REVOKE ALL ON FUNCTION {remove}(bigint, bigint) FROM PUBLIC;
