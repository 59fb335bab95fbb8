-- What a writer needs: to insert, into every column but the id. No rights on the sequence.
GRANT USAGE ON SCHEMA {schema} TO {role};
REVOKE ALL ON {outbox} FROM {role};
DO $$ BEGIN
    EXECUTE (SELECT format('GRANT INSERT (%s) ON %s TO %s', string_agg(quote_ident(attname), ', ' ORDER BY attnum), attrelid::regclass, {role_literal})
               FROM pg_attribute WHERE attrelid = {outbox_regclass}::regclass AND attnum > 0 AND NOT attisdropped AND attname <> {id_name}
              GROUP BY attrelid);
    EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM %s', pg_get_serial_sequence({outbox_regclass}, {id_name}), {role_literal});
END $$;
