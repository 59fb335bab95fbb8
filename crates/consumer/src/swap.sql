-- Puts the tables of schema '{schema}' in the place of those of the same names in the current schema, with their owners and grants.
DO $swap$
DECLARE
    fresh record;
    former record;
    kept record;
BEGIN
    DROP TABLE IF EXISTS "{schema}".__diesel_schema_migrations;
    FOR fresh IN
        SELECT c.oid, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = '{schema}' AND c.relkind IN ('r', 'p') ORDER BY c.relname
    LOOP
        SELECT c.oid, c.relowner, c.relacl INTO former FROM pg_class c
         WHERE c.relname = fresh.relname AND c.relkind IN ('r', 'p')
           AND c.relnamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = current_schema());
        IF FOUND THEN
            EXECUTE format('ALTER TABLE %I.%I OWNER TO %s', '{schema}', fresh.relname, former.relowner::regrole);
            FOR kept IN
                SELECT a.grantee, a.privilege_type, a.is_grantable FROM aclexplode(former.relacl) a WHERE a.grantee <> former.relowner
            LOOP
                EXECUTE format('GRANT %s ON %I.%I TO %s %s', kept.privilege_type, '{schema}', fresh.relname,
                    CASE kept.grantee WHEN 0 THEN 'PUBLIC' ELSE kept.grantee::regrole::text END,
                    CASE WHEN kept.is_grantable THEN 'WITH GRANT OPTION' ELSE '' END);
            END LOOP;
            -- Fails when something else depends on it, and then nothing has happened.
            EXECUTE format('DROP TABLE %I.%I', current_schema(), fresh.relname);
        END IF;
        EXECUTE format('ALTER TABLE %I.%I SET SCHEMA %I', '{schema}', fresh.relname, current_schema());
    END LOOP;
    -- Fails when the migrations made more than tables.
    DROP SCHEMA "{schema}";
END
$swap$;
