-- Takes the plain indexes of schema '{schema}' away, and keeps how they are made.
DO $away$
DECLARE
    found record;
BEGIN
    IF to_regclass(format('%I.__indexes', '{schema}')) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE %I.__indexes (definition text NOT NULL)', '{schema}');
    FOR found IN
        SELECT c.relname, pg_get_indexdef(c.oid) AS definition
          FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = '{schema}' AND NOT i.indisunique AND NOT EXISTS (SELECT FROM pg_constraint r WHERE r.conindid = c.oid)
    LOOP
        EXECUTE format('INSERT INTO %I.__indexes VALUES ($1)', '{schema}') USING found.definition;
        EXECUTE format('DROP INDEX %I.%I', '{schema}', found.relname);
    END LOOP;
END
$away$
