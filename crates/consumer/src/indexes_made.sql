-- Makes the indexes that were taken away from schema '{schema}'.
DO $made$
DECLARE
    kept record;
BEGIN
    IF to_regclass(format('%I.__indexes', '{schema}')) IS NULL THEN
        RETURN;
    END IF;
    FOR kept IN EXECUTE format('SELECT definition FROM %I.__indexes', '{schema}') LOOP
        EXECUTE kept.definition;
    END LOOP;
    EXECUTE format('DROP TABLE %I.__indexes', '{schema}');
END
$made$
