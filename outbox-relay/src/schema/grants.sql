-- What the relay's role needs, and nothing more.
GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT ON {outbox} TO {role};
GRANT SELECT, INSERT, UPDATE ON {relay}, {removed} TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON {members}, {floors}, {quarantine} TO {role};
GRANT EXECUTE ON FUNCTION {remove}(bigint, bigint) TO {role};
DO $$ BEGIN EXECUTE format('GRANT SELECT ON SEQUENCE %s TO %s', pg_get_serial_sequence({outbox_regclass}, {id_name}), {role_literal}); END $$;
