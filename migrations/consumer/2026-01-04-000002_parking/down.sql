-- What the relay keeps beside an outbox stays: the service's own outbox may need it.
DROP FUNCTION public.dead_letters_remove(bigint, bigint);
DROP TABLE public.dead_letters;
DROP FUNCTION public.dead_letters_refuse_change();
DROP TABLE parked_audit;
DROP TABLE parked_records;
DELETE FROM consumer_marks WHERE version = 0
    OR generation <> coalesce((SELECT live FROM consumer_generations g WHERE g.consumer = consumer_marks.consumer), 1);
ALTER TABLE consumer_marks
    DROP CONSTRAINT consumer_marks_pkey,
    ADD PRIMARY KEY (consumer, topic, entity_id),
    DROP CONSTRAINT consumer_marks_event_check,
    DROP CONSTRAINT consumer_marks_version_check,
    ADD CONSTRAINT consumer_marks_version_check CHECK (version > 0),
    ALTER COLUMN event_id SET NOT NULL,
    DROP COLUMN parked,
    DROP COLUMN generation;
DROP TABLE consumer_generations;
