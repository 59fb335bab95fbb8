// A relay by Watermill, from its outbox table in PostgreSQL to Kafka: what ./dev bench relay compares with as the polling peer.
package main

import (
	"context"
	"database/sql"
	"flag"
	"log"
	"time"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	watermillsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
	_ "github.com/jackc/pgx/v5/stdlib"
)

func main() {
	brokers := flag.String("brokers", "", "host:port of Kafka")
	database := flag.String("database", "", "URL of PostgreSQL")
	topic := flag.String("topic", "", "where to")
	batch := flag.Int("batch", 1000, "rows a read")
	flag.Parse()
	if err := run(*brokers, *database, *topic, *batch); err != nil {
		log.Fatal(err)
	}
}

func run(brokers, database, topic string, batch int) error {
	logger := watermill.NewStdLogger(false, false)
	db, err := sql.Open("pgx", database)
	if err != nil {
		return err
	}
	subscriber, err := watermillsql.NewSubscriber(watermillsql.BeginnerFromStdSQL(db), watermillsql.SubscriberConfig{
		ConsumerGroup:    topic,
		PollInterval:     10 * time.Millisecond,
		SchemaAdapter:    watermillsql.DefaultPostgreSQLSchema{SubscribeBatchSize: batch},
		OffsetsAdapter:   watermillsql.DefaultPostgreSQLOffsetsAdapter{},
		InitializeSchema: true,
	}, logger)
	if err != nil {
		return err
	}
	settings := kafka.DefaultSaramaSyncPublisherConfig()
	settings.Version = sarama.V3_0_0_0
	settings.Producer.RequiredAcks = sarama.WaitForAll
	settings.Producer.Compression = sarama.CompressionLZ4
	publisher, err := kafka.NewPublisher(kafka.PublisherConfig{
		Brokers: []string{brokers},
		Marshaler: kafka.NewWithPartitioningMarshaler(func(_ string, msg *message.Message) (string, error) {
			return msg.Metadata.Get("key"), nil
		}),
		OverwriteSaramaConfig: settings,
	}, logger)
	if err != nil {
		return err
	}
	router, err := message.NewRouter(message.RouterConfig{}, logger)
	if err != nil {
		return err
	}
	router.AddHandler("relay", "outbox", subscriber, topic, publisher, func(msg *message.Message) ([]*message.Message, error) {
		return message.Messages{msg}, nil
	})
	return router.Run(context.Background())
}
